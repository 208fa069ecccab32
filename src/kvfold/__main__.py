"""``python -m kvfold``"""

from kvfold.cli.main import run

run()
