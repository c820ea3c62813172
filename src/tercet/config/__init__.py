"""A recipe: what a user writes, checked before anything runs.

- `recipe_yaml`: YAML in which every value knows its line and column
- `sections`: the sections of a recipe, with defaults and their meaning
- `losses`: the losses of a recipe, by their names in sentence-transformers
- `examples`: the example recipes that are installed with tercet
- `experiment`: the values that decide the result, and the hash over them that names runs
- `recipe`: the whole recipe, read and checked; the world sizes it allows
"""
