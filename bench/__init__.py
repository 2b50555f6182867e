"""Speed beside peers, scale, profiles, GPU check, kills and mutations: programs to run."""
