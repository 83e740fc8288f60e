"""The lab model's world: task families, documents, tokenizer and training. Only `tasks` and `prompts` read it."""
