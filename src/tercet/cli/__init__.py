"""The command line: the only wing that prints or exits.

- `main`: the commands, and how errors become messages and exit codes
- `datasets`: tercet shard, append and datasets
- `models`: tercet models
- `nightly`: tercet nightly, nights and mine
- `screens`: plans and reports as text
- `demo_data`: the data of `tercet demo`, from the docstrings of Python's standard library
"""
