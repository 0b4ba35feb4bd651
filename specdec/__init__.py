"""specdec: make a reasoning model decode faster, losslessly, and prove it.

This package holds the words and seams that training and serving share. Importing it loads
neither torch nor vllm; a test holds that.
"""

__version__ = "0.1.0"
