"""``python -m kvfold`` and the console script."""

from kvfold.cli.leave import leave_at_once


def run() -> None:
    """Run the command line and exit with its code."""
    leave_at_once()  # before what takes time to import
    from kvfold.cli.main import run

    run()


if __name__ == "__main__":
    run()
