"""An OpenAI-compatible server over a transformers model whose prefixes are kept in a kvstrata cache."""
