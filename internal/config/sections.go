package config

import (
	"fmt"
	"net"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Mount is [mount].
type Mount struct {
	Dir      string `toml:"dir"`       // where programs open their databases; absolute. A hub's may be empty: no mount
	Method   string `toml:"method"`    // auto | helper | fusermount | direct
	Group    string `toml:"group"`     // members may use the mount; where the default group does not exist, the process's own
	FileMode Mode   `toml:"file-mode"` // of files
	DirMode  Mode   `toml:"dir-mode"`  // of folders
}

// DefaultGroup is the group of the mount without configuration. It may be
// missing; one that the configuration names must exist.
const DefaultGroup = "litefs"

// DefaultMount returns the defaults of a node.
func DefaultMount() Mount {
	return Mount{Dir: "/var/lib/litefs", Method: "auto", Group: DefaultGroup, FileMode: 0o660, DirMode: 0o2770}
}

// Check reports what is wrong with m. data is the data folder.
func (m *Mount) Check(c *Checker, data string) {
	c.OneOf("mount.method", m.Method, "auto", "helper", "fusermount", "direct")
	c.NotEmpty("mount.group", m.Group)
	if m.FileMode&^0o777 != 0 {
		c.Fault("mount.file-mode", "%04o: must be at most 0777", m.FileMode)
	}
	if m.DirMode&^0o3777 != 0 {
		c.Fault("mount.dir-mode", "%04o: must be at most 3777", m.DirMode)
	}
	if m.Dir == "" {
		return
	}
	c.Absolute("mount.dir", m.Dir)
	if within(m.Dir, data) || within(data, m.Dir) {
		c.Fault("mount.dir", "%s: must be neither inside the data folder %s nor around it", m.Dir, data)
	}
}

// within reports whether child is folder or below it.
func within(child, folder string) bool {
	child, folder = path.Clean(child), path.Clean(folder)
	return child == folder || strings.HasPrefix(child, strings.TrimSuffix(folder, "/")+"/")
}

// Proxy is [proxy]: the HTTP proxy in front of the application.
type Proxy struct {
	Listen        string   `toml:"listen"`         // address such as ":8080"; empty: no proxy
	Target        string   `toml:"target"`         // the application's address; required with listen
	DB            string   `toml:"db"`             // its database; required with listen
	Advertise     string   `toml:"advertise"`      // URL of this proxy for others; may be empty
	MaxLag        Duration `toml:"max-lag"`        // a replica further behind answers no reads
	WaitTimeout   Duration `toml:"wait-timeout"`   // how long to wait for a client's position
	OnTimeout     string   `toml:"on-timeout"`     // error (504) | stale (with header Litefs-Stale: 1)
	Writes        string   `toml:"writes"`         // proxy | redirect (307) | fly-replay
	Passthrough   []string `toml:"passthrough"`    // paths that are handed on without a look
	AlwaysForward []string `toml:"always-forward"` // paths that count as writes
	Cert          string   `toml:"cert"`           // with key: TLS
	Key           string   `toml:"key"`
	Routes        []Route  `toml:"route"` // more databases and targets; first match wins
}

// Route is [[proxy.route]].
type Route struct {
	Host   string `toml:"host"` // empty: any
	Path   string `toml:"path"` // such as "/grafana/*"; empty: any
	Target string `toml:"target"`
	DB     string `toml:"db"`
}

// DefaultProxy returns the defaults: no proxy.
func DefaultProxy() Proxy {
	return Proxy{
		MaxLag: Duration(10 * time.Second), WaitTimeout: Duration(5 * time.Second),
		OnTimeout: "error", Writes: "proxy",
		Passthrough: []string{}, AlwaysForward: []string{},
	}
}

// Check reports what is wrong with p.
func (p *Proxy) Check(c *Checker) {
	c.OneOf("proxy.on-timeout", p.OnTimeout, "error", "stale")
	c.OneOf("proxy.writes", p.Writes, "proxy", "redirect", "fly-replay")
	c.Positive("proxy.max-lag", p.MaxLag)
	c.Pair("proxy.cert", p.Cert, "proxy.key", p.Key)
	if p.Advertise != "" {
		c.URL("proxy.advertise", p.Advertise, "http", "https")
	}
	for i, route := range p.Routes {
		key := fmt.Sprintf("proxy.route[%d]", i+1)
		c.Address(key+".target", route.Target)
		c.DatabaseName(key+".db", route.DB)
		if route.Path != "" && !strings.HasPrefix(route.Path, "/") {
			c.Fault(key+".path", "%q: must begin with /", route.Path)
		}
	}
	if p.Listen == "" {
		return
	}
	c.Address("proxy.listen", p.Listen)
	c.Address("proxy.target", p.Target)
	c.DatabaseName("proxy.db", p.DB)
}

// Status is [status].
type Status struct {
	Socket string `toml:"socket"` // control socket of the commands; absolute
	Listen string `toml:"listen"` // address of /metrics and the status page; empty: none
}

// maxSocket is the longest path of a control socket in bytes: sun_path has 108,
// and the socket is bound beside it, in a folder with up to 12 digits.
const maxSocket = 90

// Check reports what is wrong with s.
func (s *Status) Check(c *Checker) {
	c.Absolute("status.socket", s.Socket)
	if len(s.Socket) > maxSocket {
		c.Fault("status.socket", "%s: must be at most %d bytes long", s.Socket, maxSocket)
	}
	if s.Listen != "" {
		c.Address("status.listen", s.Listen)
	}
}

// Log is [log].
type Log struct {
	Level  string `toml:"level"`  // debug | info | warn | error
	Format string `toml:"format"` // text | json
}

// DefaultLog returns the defaults.
func DefaultLog() Log { return Log{Level: "info", Format: "text"} }

// Check reports what is wrong with l.
func (l *Log) Check(c *Checker) {
	c.OneOf("log.level", l.Level, "debug", "info", "warn", "error")
	c.OneOf("log.format", l.Format, "text", "json")
}

// A Checker collects faults. Its methods take the key and the value and report
// what is wrong and how to mend it.
type Checker struct{ List []Fault }

// Fault adds a fault.
func (c *Checker) Fault(key, format string, args ...any) {
	c.List = append(c.List, Fault{Key: key, Text: fmt.Sprintf(format, args...)})
}

// OneOf wants one of the words.
func (c *Checker) OneOf(key, value string, words ...string) {
	if !slices.Contains(words, value) {
		c.Fault(key, "%q: must be %s", value, strings.Join(words, ", "))
	}
}

// NotEmpty wants any text.
func (c *Checker) NotEmpty(key, value string) {
	if value == "" {
		c.Fault(key, "must not be empty")
	}
}

// Absolute wants an absolute path.
func (c *Checker) Absolute(key, value string) {
	if !path.IsAbs(value) {
		c.Fault(key, "%q: must be an absolute path", value)
	}
}

// Positive wants a duration above 0.
func (c *Checker) Positive(key string, value Duration) {
	if value <= 0 {
		c.Fault(key, "must be above 0")
	}
}

// AtLeast wants a size of at least low.
func (c *Checker) AtLeast(key string, value, low Size) {
	if value < low {
		c.Fault(key, "%s: must be at least %s", value, low)
	}
}

// Pair wants both or neither, a certificate and its key for instance.
func (c *Checker) Pair(key1, value1, key2, value2 string) {
	if value1 == "" && value2 != "" {
		c.Fault(key1, "must be set, since %s is", key2)
	}
	if value1 != "" && value2 == "" {
		c.Fault(key2, "must be set, since %s is", key1)
	}
}

var idForm = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// ValidID reports whether id can name a node or hub.
func ValidID(id string) bool { return idForm.MatchString(id) }

// ID wants the id of a node or hub.
func (c *Checker) ID(key, value string) {
	if !ValidID(value) {
		c.Fault(key, "%q: must be 1 to 64 of A-Z a-z 0-9 _ -", value)
	}
}

// Address wants HOST:PORT; HOST may be empty.
func (c *Checker) Address(key, value string) {
	if _, port, err := net.SplitHostPort(value); err != nil || port == "" {
		c.Fault(key, "%q: must be an address with port such as \"127.0.0.1:8080\" or \":8080\"", value)
	}
}

// URL wants a URL with one of the schemes and a host. It returns nil after a
// fault.
func (c *Checker) URL(key, value string, schemes ...string) *url.URL {
	u, err := url.Parse(value)
	if err != nil || u.Host == "" || !slices.Contains(schemes, u.Scheme) {
		c.Fault(key, "%q: must be a URL with host, beginning with %s", redact(value), strings.Join(schemes, ":// or ")+"://")
		return nil
	}
	return u
}

var urlPassword = regexp.MustCompile(`(//[^/:@]*):[^@]*@`)

// redact hides the password of a URL, also of one that does not parse.
func redact(rawURL string) string { return urlPassword.ReplaceAllString(rawURL, "$1:xxxxx@") }

// Redact returns a copy of urls without passwords.
func Redact(urls []string) []string {
	list := make([]string, len(urls))
	for i, u := range urls {
		list[i] = redact(u)
	}
	return list
}

// Loopback reports whether only this machine is reached at a host. A name other
// than localhost may resolve to anything.
func Loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// MQTTPrefix wants the first levels of a topic.
func (c *Checker) MQTTPrefix(key, value string) {
	if value == "" || strings.ContainsAny(value, "+#\x00") || slices.Contains(strings.Split(value, "/"), "") || value[0] == '$' {
		c.Fault(key, "%q: must be topic levels such as \"lfs/1/site\", without +, #, $ and without / at the ends", value)
	}
}

// DatabaseName wants a path below the mount.
func (c *Checker) DatabaseName(key, value string) {
	if value == "" || path.IsAbs(value) || path.Clean(value) != value || value == "." || value == ".." || strings.HasPrefix(value, "../") {
		c.Fault(key, "%q: must be a path below the mount such as \"app.db\"", value)
	}
}

// DatabasePattern wants a DatabaseName in which ** stands for any text and * for
// any without "/".
func (c *Checker) DatabasePattern(key, value string) {
	c.DatabaseName(key, value)
	if strings.Contains(value, "***") {
		c.Fault(key, "%q: must have * or **", value)
	}
}
