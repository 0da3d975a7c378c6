"""python -m lab: as with de3, an error that the user can fix is reported in a line."""

from de3.cli import main
from lab.cli import app

main(app)
