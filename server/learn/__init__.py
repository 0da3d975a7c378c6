"""Learning of exits from live traffic (`de3 serve --learn`): records, fits, and the resulting versions."""
