"""Small tasks whose answer is known, that show in seconds to minutes what initialization decides. One file each."""
