"""The numbers: what the backend's own kernels compute, against the NumPy reference of ``dopt_api.quantizer``."""
