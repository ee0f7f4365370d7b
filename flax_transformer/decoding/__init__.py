"""Everything between a trained model and translated text: search, batching and the translator."""
