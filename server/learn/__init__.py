"""Exits that grow from live traffic (`de3 serve --learn`): records, fits, and the versions that come of them."""
