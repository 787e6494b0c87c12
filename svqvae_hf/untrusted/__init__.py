"""Guards against hostile files, called from few lines; docs/untrusted_files.md says why. Imports no other room."""
