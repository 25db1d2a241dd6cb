"""Distil a big image classifier into a small one, compress it, export it, and measure the files.

python train.py teacher=resnet50 student=mobilenet

What it does, top to bottom: distill/cli/pipeline.py. Where the package is installed, `distill` and `python -m distill`
are the same command.
"""

from distill.__main__ import main

if __name__ == "__main__":
    main()
