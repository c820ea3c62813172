"""From raw rows to dataset versions, to this machine's cache, to the order in which training uses them.

- `row_checks`: what is wrong with a row
- `csv_records`: CSV records with their line numbers
- `readers`: raw rows from files of every format, with file and line
- `ingest`: raw rows to checked rows; bad rows are quarantined
- `manifest`: what a dataset version holds, and which split a row belongs to
- `versions`: published versions, and HEAD, which names the newest
- `shard_writer`: Parquet shards of each split
- `build`: raw rows to a new version
- `near_duplicates`: an index that finds rows that are nearly the same
- `append`: new rows to a version that extends the newest
- `cache`: shards on this machine: downloaded once, verified, memory-mapped
- `token_cache`: token ids of shards on this machine, memory-mapped
- `no_duplicates`: batches in which no text occurs twice
- `order`: (seed, epoch, step, world size) to rows; no other module decides order
- `longest_batches`: the micro-batches of a run that need the most memory
- `text_stats`: which texts are equal, and about how many tokens a row has
"""
