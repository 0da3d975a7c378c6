"""python -m lab: as de3, an error that the user can fix is reported in one line."""

from de3.cli import main
from lab.cli import app

main(app)
