"""A recipe: what a user writes, checked before anything runs.

- `recipe_yaml`: YAML in which every value has a line and a column
- `sections`: the sections of a recipe, with defaults and meanings
- `losses`: the losses of a recipe, by their names in sentence-transformers
- `examples`: the example recipes that are installed with tercet
- `experiment`: the values that decide the result, and the hash over them that names runs
- `recipe`: read and check a whole recipe; the world sizes that it allows
"""
