package hub

import (
	"crypto/x509"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/litefs-agent/litefs-agent/internal/config"
	"github.com/litefs-agent/litefs-agent/internal/reload"
	"github.com/litefs-agent/litefs-agent/internal/tlsfiles"
	"github.com/litefs-agent/litefs-agent/transport"
)

// An Auth says who a peer is by its credentials: a bearer token, or a client
// certificate whose common name or DNS name is the node's id. A nil Auth, and one
// on loopback as long as there is neither a token file nor a client CA, lets
// everybody be who it says it is.
type Auth struct {
	tokens  *reload.Source[tokenList] // nil: no token is good
	tls     *tlsfiles.Server          // nil: no TLS
	byCert  bool                      // certificates are asked for
	outside bool                      // not only loopback reaches the hub

	mu   sync.Mutex // guards seen
	seen bool       // a token file was there: from then on its absence means no token
}

// NewAuth reads the token file.
func NewAuth(cfg Config, files *tlsfiles.Server, log *slog.Logger) (*Auth, error) {
	a := &Auth{tls: files, byCert: cfg.HTTP.ClientCA != "", outside: !loopback(cfg.HTTP.Listen)}
	if cfg.Auth.Tokens == "" {
		return a, nil
	}
	file := TokenFile{Path: cfg.Auth.Tokens}
	var err error
	a.tokens, err = reload.New("the token file", log, func() (tokenList, error) {
		l, err := file.read()
		return l, permissionHint(err, file.Path)
	}, file.Path)
	if err == nil && a.outside && !a.byCert && len(a.tokens.Get().tokens) == 0 {
		log.Warn("no node can connect yet: enrol one with 'litefs-agent hub token add NODE'")
	}
	return a, err
}

// list returns the tokens, and whether credentials are asked for.
func (a *Auth) list() (tokenList, bool) {
	var l tokenList
	if a.tokens != nil {
		l = a.tokens.Get()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.seen = a.seen || l.exists
	return l, a.seen || a.byCert || a.outside
}

// An identity is whom credentials name.
type identity struct {
	anybody bool
	names   []string // the node's ids that are good; not empty unless anybody
	by      string   // "token", "certificate"
}

func authRefusal(format string, args ...any) error {
	return transport.Refuse(transport.CodeAuth, format, args...)
}

// who says whom the credentials of a peer name.
func (a *Auth) who(peer transport.Peer) (id identity, err error) {
	if a == nil {
		return identity{anybody: true}, nil
	}
	tokens, asked := a.list()
	if peer.Token != "" {
		node := tokens.who(peer.Token)
		if node == "" {
			return id, authRefusal("the hub does not know this token: it was revoked, or is of another hub; make one there with 'litefs-agent hub token add NODE' and give it to the node with 'litefs-agent join'")
		}
		id = identity{names: []string{node}, by: "token"}
	}
	cert, err := a.tls.VerifyClient(peer.TLS)
	if err != nil {
		return id, authRefusal("the node's certificate is not good here: %v", err)
	}
	if cert != nil {
		names := certNames(cert)
		if peer.Token != "" && !slices.Contains(names, id.names[0]) {
			return id, authRefusal("the token is of node %s, the certificate of %q: show one of the two", id.names[0], names)
		}
		if peer.Token == "" {
			if len(names) == 0 {
				return id, authRefusal("the certificate names no node: its common name or a DNS name must be the node's id")
			}
			id = identity{names: names, by: "certificate"}
		}
	}
	if len(id.names) == 0 {
		if asked {
			return id, authRefusal("this hub wants a token, or a certificate of its client-ca: make a token there with 'litefs-agent hub token add NODE' and give it to the node with 'litefs-agent join'")
		}
		id.anybody = true
	}
	return id, nil
}

// check refuses a peer whose credentials do not name the node.
func (a *Auth) check(peer transport.Peer, node string) error {
	id, err := a.who(peer)
	if err != nil || id.anybody || slices.Contains(id.names, node) {
		return err
	}
	return authRefusal("the %s is of node %q, this node is %q: set [node] id to that on an empty data folder, or give this node its own",
		id.by, id.names[0], node)
}

// certNames returns the node ids that a certificate names.
func certNames(cert *x509.Certificate) (names []string) {
	for _, name := range append([]string{cert.Subject.CommonName}, cert.DNSNames...) {
		if config.ValidID(name) && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// problems says what of the files is not in force.
func (a *Auth) problems() (list []string) {
	if a == nil {
		return nil
	}
	var errs []error
	errs = append(errs, a.tls.Problem())
	if a.tokens != nil {
		errs = append(errs, a.tokens.Err())
	}
	for _, err := range errs {
		if err != nil {
			list = append(list, err.Error())
		}
	}
	return list
}

// openTLS reads what [http] cert names; nil without TLS.
func openTLS(cfg Config, log *slog.Logger) (*tlsfiles.Server, error) {
	h := cfg.HTTP
	if h.Cert == "" {
		return nil, nil
	}
	files, err := tlsfiles.NewServer(tlsfiles.ServerFiles{
		Cert: h.Cert, Key: h.Key, ClientCA: h.ClientCA, Required: cfg.Auth.Tokens == "",
	}, log)
	if err != nil {
		return nil, fmt.Errorf("http.cert: %w", err)
	}
	return files, nil
}
