"""The HTTP service: translation for programs that speak LibreTranslate's API, explanations and a page for people."""
