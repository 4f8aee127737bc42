"""Job completion time, measured: tables and plots of records (homkv.sim.record), and the replay on this machine."""
