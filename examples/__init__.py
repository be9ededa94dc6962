"""Runnable examples; ``python examples/<name>/demo.py`` or ``python -m examples.<name>.demo``."""
