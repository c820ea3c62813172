"""A recipe: what a user writes, checked before anything runs.

- `recipe_yaml`: YAML in which every value knows its line and column
- `sections`: the sections of a recipe, with defaults and their meaning
- `losses`: the losses of a recipe, by their names in sentence-transformers
- `examples`: the example recipes that are installed with tercet
- `recipe`: the whole recipe, read and checked; its hash; the world sizes it allows
"""
