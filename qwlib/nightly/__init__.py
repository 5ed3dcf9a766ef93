"""Notebooks executed without a screen, their figures held to a baseline, and the pages that tell.

runner     `run(plans, out)`, each notebook in a process of its own
executing  one notebook, by papermill
suite      which notebooks, at what size
nights     `run(notebooks, out)`, a whole night
gated      the figures that are gated
gates      whether a figure is worse, or noise
history    one JSON line a night
report     the index page
pages      executed notebooks as HTML
outputs    what committed notebooks show without being run
opening    badge and set-up cell of every notebook
"""
