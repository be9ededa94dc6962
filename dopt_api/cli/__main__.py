"""``python -m dopt_api.cli`` is ``dopt``."""

from dopt_api.cli import main

if __name__ == "__main__":
    main()
