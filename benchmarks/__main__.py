from benchmarks.cli import main

if __name__ == "__main__":  # and not where a process is spawned
    raise SystemExit(main())
