"""Guards against hostile files. docs/untrusted_files.md says what they promise. Imports no subpackage above it."""
