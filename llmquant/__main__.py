"""``python -m llmquant``."""

from llmquant.cli import main

main()
