"""The console: pages on which a person looks at conversations in a browser (docs/console.md)."""
