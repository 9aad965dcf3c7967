"""Where the code comes from: pins, index, git checkouts, archives, patches."""
