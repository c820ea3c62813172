"""Raw rows become dataset versions, versions are cached on this machine, and the order of rows is decided.

- `row_checks`: what is wrong with a row
- `csv_records`: CSV records with their line numbers
- `readers`: raw rows from files of every format, with file and line
- `ingest`: raw rows to checked rows; bad rows are quarantined
- `manifest`: what a dataset version holds, and which split a row belongs to
- `versions`: published versions, and HEAD, which names the newest
- `shard_writer`: the Parquet shards of one split
- `build`: raw rows to a new version
- `near_duplicates`: rows that are nearly the same
- `append`: new rows to a version that extends the newest
- `cache`: the shards on this machine: downloaded once, verified, memory-mapped
- `no_duplicates`: an order in which no batch holds a text twice
- `order`: (seed, epoch, step, world size) to rows: the one place that decides order
- `text_stats`: which texts are equal, and about how many tokens a row has
"""
