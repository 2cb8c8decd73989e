//go:build sabotage

package sabotage

import "os"

// Variable is the environment variable that names the rule to switch off.
const Variable = "LITEFS_AGENT_SABOTAGE"

var active = Rule(os.Getenv(Variable))

// On reports whether a rule is switched off in this process.
func On(r Rule) bool { return r == active }
