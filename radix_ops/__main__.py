import sys

from radix_ops_command import main

sys.exit(main())
