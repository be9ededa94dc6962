"""The vendor's import path for PyTorch: ``from dopt.dopt_torch.opt_main import ...``."""
