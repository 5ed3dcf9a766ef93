"""Fine-tuning: training data read and checked, and a model trained on it by LoRA, by QLoRA, or in full.

LoRA trains two small matrices beside each linear layer and leaves the weights alone. Where these are stored in 4 bits it is
called QLoRA. The products of frozen weights are differentiated with respect to their inputs only, so the weights may be of any
type. `distill` trains all weights for a form of fewer bits, with the model in 16 bits as their teacher.
"""
