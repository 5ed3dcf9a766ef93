"""Where models and texts come from: the catalog, the disk, the Hub, the embedded model, random weights.

catalog         `find(name)`, one row for a name, a folder, a Hub id, a file; `once`, what was found out stays with the row
checkpoints     of a row: its folder, the scheme that it was saved in, what it was made from
artefacts       manifests of quantized folders: `seal`, `read`, `verify`
adapters        LoRA adapters: where their files lie; `put_over`
embedded        the model and the text that need no network
hub             files of the Hub, and its errors in one line
random_weights  checkpoints of a true shape
estimates       `estimate(model, scheme)`, bytes before anything is loaded
texts           what quality is measured on
"""
