"""This machine: what it has, what was chosen for it, and what it takes for a model to run.

about       `environment()`, the `env` of a record; `banner()`, the same for a notebook
arithmetic  `choose(dtype, device)`, the type of matrix multiplications; `hook(model)`
clock       `best(ways, …)`, calls timed in turn; `copy_bandwidth(device)`
devices     `pick_device()`, `pick_dtype(scheme, device)`, each with its reason
memory      bytes of tensors, of the process, of a GPU; peaks
processes   `environment()` for processes that multiply; `last_word`, why one ended
processor   `name()`, `capability()`
"""
