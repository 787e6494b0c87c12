"""Guards against hostile files. SECURITY.md says what they promise. Imports no subpackage above it."""
