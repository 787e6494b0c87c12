"""Files, folders, records and identities: what needs neither torch nor diffusers, which take seconds to import."""
