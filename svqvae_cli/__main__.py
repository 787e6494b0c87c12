import sys

from svqvae_cli.parser import main

sys.exit(main())
