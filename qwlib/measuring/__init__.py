"""Memory, speed and quality of a loaded model, as records, and records side by side.

bench       `bench(model, schemes, folder)`, a process and a record a row
worker      one job, one process, one record
timing      speed; percentiles
quality     perplexity and divergence
reference   scores of the 16-bit model, kept for a comparison
tasks       lm-evaluation-harness
record      the schema: `new`, `write`, `read`
describing  the parts of a record that say what was measured
compare     records as rows of a table
plots       records as figures
"""
