"""The Hugging Face hub: what a repository holds, and its files in the ordinary cache, every one checked."""
