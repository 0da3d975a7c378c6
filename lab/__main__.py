"""Entry point of `python -m lab`; as in `de3`, errors that the user can fix are reported in one line."""

from de3.cli import main
from lab.cli import app

main(app)
