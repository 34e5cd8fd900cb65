"""`python -m nnpassport`, which launchers of several processes like better than a script."""

from nnpassport.cli.app import main

if __name__ == "__main__":
    main()
