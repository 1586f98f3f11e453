"""Stacks whose layers stand on several ranks of `torch.distributed`."""
