"""prototype_contrastive_loss in Triton: forward, backward, and the gradient of the prototypes."""
