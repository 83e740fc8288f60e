"""The lab model's world: its task families, its documents, its tokenizer and its training. Nothing outside reads it but `tasks` and `prompts`."""
