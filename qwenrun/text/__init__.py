"""Text: tokens and characters, conversations and prompts, reasoning and answers. Knows no model and no engine."""
