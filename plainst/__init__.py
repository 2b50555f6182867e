"""The ground floor: files, tables, runs. A reader of a paper need not go down here."""
