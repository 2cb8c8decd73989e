package e2e

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// A secureSite is a hub that everybody may reach, with TLS and tokens.
type secureSite struct {
	*testrig.Env
	hub            *testrig.Service
	ca             *testrig.CA
	cert, key      string // in force at the hub
	tokens         string // the file
	addr, url, dir string
}

func newSecureSite(t *testing.T, config string) *secureSite {
	t.Helper()
	s := &secureSite{Env: testrig.New(t), ca: testrig.NewCA(t, "site CA"), addr: freeAddr(t)}
	s.dir = s.Folder("site")
	s.cert, s.key, s.tokens = filepath.Join(s.dir, "hub.pem"), filepath.Join(s.dir, "hub.key"), filepath.Join(s.dir, "tokens")
	s.install(s.ca.Server("hub"))
	_, port, _ := net.SplitHostPort(s.addr)
	s.url = "https://" + s.addr
	s.hub = s.NewHub(":"+port, testrig.Options{
		Mount: true, Config: fmt.Sprintf("[auth]\ntokens = %q\n", s.tokens),
		HTTP: fmt.Sprintf("cert = %q\nkey = %q\n", s.cert, s.key) + config,
	})
	s.start()
	return s
}

// start starts the hub and waits until it listens.
func (s *secureSite) start() {
	s.Helper()
	s.hub.Start()
	s.Wait(10*time.Second, "the hub listens", func() bool {
		conn, err := net.Dial("tcp", s.addr)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

// install makes a certificate the hub's.
func (s *secureSite) install(cert, key string) {
	s.Helper()
	for to, from := range map[string]string{s.cert: cert, s.key: key} {
		b, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(to+".new", b, 0o600)
		}
		if err == nil {
			err = os.Rename(to+".new", to)
		}
		if err != nil {
			s.Fatal(err)
		}
	}
}

// token has a token made for a node.
func (s *secureSite) token(node string) string {
	s.Helper()
	token := s.Must(s.hub.Client("hub", "token", "add", "--config", s.hub.Config(), node), "")
	if len(token) != 64 {
		s.Fatalf("token add printed %q, want the token alone", token)
	}
	return token
}

// join enrols a service that is not started yet, and returns what join prints.
func (s *secureSite) join(node *testrig.Service, token string, more ...string) (string, error) {
	s.Helper()
	args := append([]string{"join", "--config", node.Config(), "--ca", s.ca.File}, more...)
	return testrig.Output(node.Client(append(args, s.url, token)...), "")
}

// alone makes a node with an empty data folder start without its hub.
const alone = "restore = \"off\"\n"

// enrol adds a node with a token of its own and starts it.
func (s *secureSite) enrol(id string) *testrig.Service {
	s.Helper()
	node := s.NewNode(testrig.Options{ID: id, NoID: true})
	if out, err := s.join(node, s.token(id)); err != nil {
		s.Fatalf("join: %v\n%s", err, out)
	}
	node.Start()
	return node
}

// linkError waits until the node's link has an error with the text.
func linkError(env *testrig.Env, node *testrig.Service, text string) {
	env.Helper()
	env.Wait(30*time.Second, "the node says: "+text, func() bool {
		link, _ := node.Status()["hub"].(map[string]any)
		err, _ := link["error"].(string)
		return strings.Contains(err, text)
	})
}

func connected(node *testrig.Service) bool {
	link, _ := node.Status()["hub"].(map[string]any)
	return link["state"] == "connected"
}

// A node is enrolled with two commands, ships over TLS, and is cut off when its
// token is revoked, while another goes on.
func TestEnrol(t *testing.T) {
	s := newSecureSite(t, "")
	node := s.NewNode(testrig.Options{ID: "pi-1", NoID: true})
	before, err := os.ReadFile(node.Config())
	if err != nil {
		t.Fatal(err)
	}
	token := s.token("pi-1")
	out, err := s.join(node, token)
	site, _ := s.hub.Status()["site"].(string)
	if err != nil || !strings.Contains(out, site) || len(site) != 32 {
		t.Fatalf("join: %v, %s; want site %q", err, out, site)
	}
	after, err := os.ReadFile(node.Config())
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(before) {
		if !bytes.Contains(after, line) {
			t.Errorf("join lost the line %q", line)
		}
	}
	if out, err := s.join(node, token); err != nil || !strings.Contains(out, "already") {
		t.Errorf("join again: %v, %s, want that nothing changes", err, out)
	}
	info, err := os.Stat(filepath.Join(node.Dir, "token"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("token file: %v, %v, want mode 0600", info, err)
	}
	node.Start()
	s.SQL(node.Path("a.db"), "CREATE TABLE t(v,n);"+fill("t", 100, 100))
	sameAtHub(s.Env, node, s.hub, "a.db")
	if list := s.Must(s.hub.Client("hub", "token", "list", "--config", s.hub.Config()), ""); !strings.Contains(list, "pi-1") || strings.Contains(list, token) {
		t.Errorf("token list: %s", list)
	}
	other := s.enrol("pi-2")
	s.SQL(other.Path("b.db"), "CREATE TABLE t(v,n);"+fill("t", 10, 100))
	sameAtHub(s.Env, other, s.hub, "b.db")

	s.Must(s.hub.Client("hub", "token", "revoke", "--config", s.hub.Config(), "pi-1"), "")
	began := time.Now()
	linkError(s.Env, node, "the hub does not know this token")
	t.Logf("cut off %s after the revocation", time.Since(began).Round(time.Millisecond))
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the session ended %s after its token was revoked", took)
	}
	if !connected(other) {
		t.Error("the other node lost its link")
	}
	s.SQL(node.Path("a.db"), fill("t", 10, 100)) // it goes on alone
	if out, err := s.join(node, s.token("pi-1")); err != nil {
		t.Fatalf("join again: %v\n%s", err, out)
	}
	node.Restart()
	sameAtHub(s.Env, node, s.hub, "a.db")
}

// Each thing that can be wrong about a join is told with its cure, and changes
// nothing.
func TestJoinRefused(t *testing.T) {
	s := newSecureSite(t, "")
	good, theirs := s.token("n1"), s.token("n2")
	stranger := testrig.NewCA(t, "another CA")
	node := s.NewNode(testrig.Options{}) // [node] id = "n1"
	taken := s.NewNode(testrig.Options{ID: "n3", NoID: true, Config: "[hub]\nurl = \"https://elsewhere.example\"\n"})
	old := s.NewNode(testrig.Options{ID: "n4", NoID: true})
	if err := os.MkdirAll(old.Data, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(old.Data, "link.json"), []byte(`{"site":"00112233445566778899aabbccddeeff","session":7}`), 0o600); err != nil {
		t.Fatal(err)
	}
	named := s.NewNode(testrig.Options{ID: "n5", NoID: true})
	if err := os.MkdirAll(named.Data, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(named.Data, "id"), []byte("pi-old\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(s.addr)
	tests := []struct {
		name string
		node *testrig.Service
		args []string
		want string
	}{
		{"wrong token", node, []string{"--ca", s.ca.File, s.url, strings.Repeat("0", 64)}, "hub token add NODE"},
		{"no token", node, []string{"--ca", s.ca.File, s.url, ""}, "holds no token"},
		{"token of another node", node, []string{"--ca", s.ca.File, s.url, theirs}, "hub token add n1"},
		{"unknown CA", node, []string{s.url, good}, "--ca FILE"},
		{"wrong CA", node, []string{"--ca", stranger.File, s.url, good}, "--ca FILE"},
		{"no CA file", node, []string{"--ca", "/nowhere.pem", s.url, good}, "/nowhere.pem"},
		{"another name", node, []string{"--ca", s.ca.File, "https://127.0.0.2:" + port, good}, "for another name"},
		{"nobody there", node, []string{"--ca", s.ca.File, "https://" + freeAddr(t), good}, "cannot be reached"},
		{"in clear to TLS", node, []string{"--ca", s.ca.File, "http://" + s.addr, good}, "use https://"},
		{"in clear over the net", node, []string{"http://hub.example:20202", good}, "use https://"},
		{"no URL", node, []string{"hub.example", good}, "must be a URL"},
		{"another hub", taken, []string{"--ca", s.ca.File, s.url, good}, "--force"},
		{"another site", old, []string{"--ca", s.ca.File, s.url, good}, "--site 00112233445566778899aabbccddeeff"},
		{"another node's folder", named, []string{"--ca", s.ca.File, s.url, good}, "hub token add pi-old"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before, _ := readFile(tt.node.Config())
			out, err := testrig.Output(tt.node.Client(append([]string{"join", "--config", tt.node.Config()}, tt.args...)...), "")
			if err == nil || !strings.Contains(out, tt.want) {
				t.Errorf("got %v, %s; want an error with %q", err, out, tt.want)
			}
			if after, _ := readFile(tt.node.Config()); after != before {
				t.Errorf("the configuration changed:\n%s", after)
			}
			if testrig.Exists(filepath.Join(tt.node.Dir, "token")) {
				t.Error("a token was written")
			}
		})
	}
	out, err := testrig.Output(taken.Client("join", "--force", "--config", taken.Config(), "--ca", s.ca.File, s.url, s.token("n3")), "")
	if text, _ := readFile(taken.Config()); err != nil || strings.Contains(text, "elsewhere") || !strings.Contains(text, s.url) {
		t.Errorf("join --force: %v, %s; the configuration:\n%s", err, out, text)
	}
}

// A renewed certificate is taken without a restart; a broken one is not, and the
// hub says so.
func TestRenewCertificate(t *testing.T) {
	s := newSecureSite(t, "")
	node := s.enrol("pi-1")
	s.SQL(node.Path("a.db"), "CREATE TABLE t(v,n);"+fill("t", 10, 100))
	sameAtHub(s.Env, node, s.hub, "a.db")
	shown := func() string {
		conn, err := tls.Dial("tcp", s.addr, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if v := conn.ConnectionState().Version; v != tls.VersionTLS13 {
			t.Errorf("TLS version %#x, want 1.3", v)
		}
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	problems := func() string { return fmt.Sprint(s.hub.Status()["problems"]) }
	first := shown()
	if problems() != "<nil>" {
		t.Errorf("problems %s, want none", problems())
	}
	s.install(s.ca.Server("renewed"))
	second := shown()
	if second == first {
		t.Error("the hub shows the old certificate")
	}
	if err := os.WriteFile(s.cert, []byte("-----BEGIN CERTIFICATE-----\nbroken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := shown(); got != second {
		t.Errorf("with a broken file the hub shows %s, want the one before", got)
	}
	if !strings.Contains(problems(), s.cert) || !strings.Contains(s.hub.Log(), "the old content stays in force") {
		t.Errorf("neither status (%s) nor log say that the certificate is broken", problems())
	}
	if old, err := tls.Dial("tcp", s.addr, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS11}); err == nil {
		old.Close()
		t.Error("the hub speaks TLS 1.1")
	}
	s.install(s.ca.Server("again"))
	if got := shown(); got == second || problems() != "<nil>" {
		t.Errorf("a good file after the broken one: got %s, problems %s", got, problems())
	}
	if !connected(node) {
		t.Error("the node lost its link")
	}
	// The token file likewise: what is broken revokes nobody.
	good, _ := readFile(s.tokens)
	if err := os.WriteFile(s.tokens, []byte("pi-1 broken\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Wait(5*time.Second, "the hub names the broken token file", func() bool { return strings.Contains(problems(), "line 1") })
	if err := os.WriteFile(s.tokens, []byte(good), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Wait(5*time.Second, "the hub takes the mended token file", func() bool { return problems() == "<nil>" })
	node.Restart()
	sameAtHub(s.Env, node, s.hub, "a.db")
}

// With mutual TLS the certificate names the node.
func TestMutualTLS(t *testing.T) {
	nodes := testrig.NewCA(t, "nodes CA")
	s := newSecureSite(t, fmt.Sprintf("client-ca = %q\n", nodes.File))
	config := func(cert, key string) string {
		return fmt.Sprintf("[hub]\nurl = %q\nca = %q\ncert = %q\nkey = %q\n", s.url, s.ca.File, cert, key)
	}
	node := s.Node(testrig.Options{ID: "pi-1", Config: config(nodes.Client("pi-1"))})
	s.SQL(node.Path("a.db"), "CREATE TABLE t(v,n);"+fill("t", 10, 100))
	sameAtHub(s.Env, node, s.hub, "a.db")
	byName := s.Node(testrig.Options{ID: "pi-2", Config: config(nodes.Client("some board", "pi-2"))})
	s.SQL(byName.Path("a.db"), "CREATE TABLE t(v,n);"+fill("t", 10, 100))
	sameAtHub(s.Env, byName, s.hub, "a.db")
	liar := s.Node(testrig.Options{ID: "pi-3", Node: alone, Config: config(nodes.Client("pi-1"))})
	linkError(s.Env, liar, `the certificate is of node "pi-1", this node is "pi-3"`)
	bare := s.Node(testrig.Options{ID: "pi-4", Node: alone, Config: fmt.Sprintf("[hub]\nurl = %q\nca = %q\n", s.url, s.ca.File)})
	linkError(s.Env, bare, "this hub wants a token, or a certificate of its client-ca")
	// A program that shows a certificate of another CA, which Go's would not.
	stranger, err := tls.LoadX509KeyPair(testrig.NewCA(t, "foreign CA").Client("pi-1"))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := tls.Dial("tcp", s.addr, &tls.Config{InsecureSkipVerify: true, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &stranger, nil }})
	if err == nil {
		_, err = conn.Read(make([]byte, 1)) // TLS 1.3: the server's word comes after the handshake
		conn.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "certificate authority") {
		t.Errorf("a certificate of a foreign CA: got %v, want the handshake refused", err)
	}
	for _, x := range []*testrig.Service{liar, bare} {
		if testrig.Exists(s.hub.Path("nodes/" + x.ID)) {
			t.Errorf("%s has a folder at the hub", x.ID)
		}
	}
	// The CA is replaced: who has a certificate of the old one is cut off.
	b, err := os.ReadFile(testrig.NewCA(t, "next CA").File)
	if err == nil {
		err = os.WriteFile(nodes.File, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.Wait(10*time.Second, "the node is cut off", func() bool { return !connected(node) })
}

// Where others than this machine reach the hub it does not start without TLS and
// authentication, and says what to do.
func TestOpenHubIsRefused(t *testing.T) {
	env := testrig.New(t)
	dir := env.Folder("hubs")
	cert, key := testrig.NewCA(t, "CA").Server("hub")
	secure := fmt.Sprintf("cert = %q\nkey = %q\n", cert, key)
	for i, tt := range []struct{ http, auth, want string }{
		{"listen = \":0\"\n", "", "set http.cert and http.key, or listen on 127.0.0.1"},
		{"listen = \"[::]:0\"\n", "", "set http.cert and http.key, or listen on 127.0.0.1"},
		{"listen = \"192.0.2.1:0\"\n", "", "set http.cert and http.key, or listen on 127.0.0.1"},
		{"listen = \":0\"\n" + secure, "tokens = \"\"\n", "set auth.tokens or http.client-ca"},
		{"listen = \":0\"\n", "tokens = \"/nowhere/tokens\"\n", "set http.cert and http.key"},
		{"listen = \":0\"\ncert = \"/nowhere.pem\"\nkey = \"/nowhere.key\"\n", "", "/nowhere.pem"},
		{"listen = \"127.0.0.1:0\"\nclient-ca = \"/ca.pem\"\n", "", "needs http.cert"},
	} {
		file := filepath.Join(dir, fmt.Sprintf("%d.toml", i))
		text := fmt.Sprintf("[hub]\ndata = %q\n[status]\nsocket = %q\n[http]\n%s[auth]\n%s", filepath.Join(dir, fmt.Sprint(i)), filepath.Join(dir, "s"), tt.http, tt.auth)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := testrig.Output(env.Command(env.Program, "hub", "--config", file), "")
		if err == nil || !strings.Contains(out, tt.want) {
			t.Errorf("%s%s: got %v, %s; want a refusal with %q", tt.http, tt.auth, err, out, tt.want)
		}
	}
}
