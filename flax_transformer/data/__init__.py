"""Everything between text files and batches of token ids: corpora, vocabularies and the data pipeline."""
