"""The program: `python -m distill`, `distill` (the console script) and `python train.py`."""

from distill.cli.command import command
from distill.cli.pipeline import pipeline

main = command(pipeline)

if __name__ == "__main__":
    main()
