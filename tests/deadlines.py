"""How long tests wait for what comes at once on an idle machine."""

# Only a test that fails waits so long; a machine that does other work too takes its time. It stays
# below the leases of KV (120 s), which would free what a test wants to see freed at once.
SOON_S = 60.0
