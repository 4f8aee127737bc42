"""``python -m homkv.cli``: the command line without the installed script."""

from homkv.cli import main

main()
